/* The kernels in the library's read-only data: PSOUP__IMAGES is a file of PSOUP__IMAGE("FATBIN") lines. */
#define PSOUP__IMAGE(file) \
        .section .rodata.psoup__gpu, "a"; \
        .balign 64; \
99:     .incbin file; \
        .byte 0; \
        .section .data.rel.ro.psoup__gpu, "aw"; \
        .quad 99b;

        .section .data.rel.ro.psoup__gpu, "aw"
        .balign 8
        .globl psoup__gpu_images
        .hidden psoup__gpu_images
        .type psoup__gpu_images, %object
psoup__gpu_images:
#include PSOUP__IMAGES
        .section .data.rel.ro.psoup__gpu, "aw"
        .quad 0
        .size psoup__gpu_images, . - psoup__gpu_images
        .section .note.GNU-stack, "", %progbits
