/* Opening the driver. */
#include "gpu/driver.h"

#include <dlfcn.h>
#include <string.h>

/* A data pointer as a function pointer, which C does not convert. */
static bool find(void *library, const char *symbol, void *call) {
    void *address = dlsym(library, symbol);
    memcpy(call, &address, sizeof address);
    return address != NULL;
}

/* NODELETE, as for cuBLASLt: neither is made to be unloaded, nor quick to load. */
psoup_status psoup__driver_open(psoup__driver *driver, psoup_error *error) {
    *driver = (psoup__driver){.library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)};
    if (!driver->library)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "no GPU: NVIDIA's driver is not here (%s)",
                           dlerror());
    const char *missing = NULL;
#define FIND(field, symbol, parameters)                                                                    \
    if (!missing && !find(driver->library, #symbol, &driver->field))                                       \
        missing = #symbol;
    PSOUP__CU_CALLS(FIND)
#undef FIND
    psoup_status status = PSOUP_OK;
    psoup__cu_result result = missing ? 0 : driver->init(0);
    const char *text = NULL;
    if (missing)
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "no GPU: libcuda.so.1 has no %s; a driver for CUDA 12 or later is needed",
                             missing);
    else if (result != 0)
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "no GPU: the driver does not start: %s",
                             driver->error_string(result, &text) == 0 && text ? text : "unknown error");
    if (status != PSOUP_OK)
        psoup__driver_close(driver);
    return status;
}

void psoup__driver_close(psoup__driver *driver) {
    if (driver->library)
        dlclose(driver->library);
    driver->library = NULL;
}
