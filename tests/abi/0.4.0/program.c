/* Compiled against the 0.4.0 headers kept beside it, run on today's libpsoup.so: what 0.4 added. */
#include <stdio.h>
#include <string.h>

#include "psoup/psoup.h"

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.4.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

int main(void) {
    EXPECT(psoup_ppo_fields() != NULL);
    EXPECT(strcmp(psoup_version(), "0.4.0") >= 0);
    return 0;
}
