/* Memory that there is for this program. */
#ifndef ROOM_H
#define ROOM_H

#include <stdbool.h>
#include <stdint.h>

/* Bytes that the system could give the program now; −1 where it does not say. *grouped: a control group has less than the
 * machine. root: "", or where a test keeps other files of /proc and /sys. */
int64_t room_for_program(const char *root, bool *grouped);

#endif
