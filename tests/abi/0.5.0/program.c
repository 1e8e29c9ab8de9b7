/* Compiled against the 0.5.0 headers kept beside it, run on today's libpsoup.so: what 0.5 added. */
#include <stdio.h>
#include <string.h>

#include "psoup/ppo.h"

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.5.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

int main(void) {
    EXPECT(psoup_ppo_fields() != NULL);
    EXPECT(strcmp(psoup_version(), "0.5.0") >= 0);
    return 0;
}
