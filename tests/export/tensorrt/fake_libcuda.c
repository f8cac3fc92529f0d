// A CUDA driver without a GPU, with the prototypes of the real header: device memory is host memory, streams run at once.
// It has the calls that the toolkit makes, each of which appends its name and process to the file in FAKE_CUDA_LOG.
// FAKE_CUDA_GPUS lists GPUs as NAME:MAJOR:MINOR:MIB, separated by commas, and CUDA_VISIBLE_DEVICES selects by index.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_GPUS 8
typedef struct { char name[64]; int major, minor; size_t mib; int index; } Gpu;
static Gpu gpus[MAX_GPUS];
static int gpu_count, depth, is_started, context_object, graph_object;
static double now;

static CUresult note(const char *name) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) { fprintf(log, "%s %d\n", name, (int)getpid()); fclose(log); }
    const char *fails = getenv("FAKE_CUDA_FAILS"), *status = getenv("FAKE_CUDA_STATUS");
    return fails && !strcmp(fails, name) ? (CUresult)atoi(status ? status : "999") : CUDA_SUCCESS;
}
#define NOTE() do { CUresult status = note(__func__); if (status) return status; } while (0)

CUresult CUDAAPI cuInit(unsigned int flags) {
    NOTE();
    if (is_started++) return CUDA_SUCCESS;
    Gpu all[MAX_GPUS];
    int count = 0;
    const char *list = getenv("FAKE_CUDA_GPUS"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    char *text = strdup(list ? list : "NVIDIA Fake:8:9:24576");
    for (char *item = strtok(text, ","); item && count < MAX_GPUS; item = strtok(NULL, ","), count++) {
        sscanf(item, "%63[^:]:%d:%d:%zu", all[count].name, &all[count].major, &all[count].minor, &all[count].mib);
        all[count].index = count;
    }
    if (!visible) { memcpy(gpus, all, sizeof(all)); gpu_count = count; }
    else {
        text = strdup(visible);
        for (char *item = strtok(text, ","); item; item = strtok(NULL, ",")) {
            int index = atoi(item);
            if (index < 0 || index >= count) break;  // CUDA ignores the devices after an invalid one
            gpus[gpu_count++] = all[index];
        }
    }
    return gpu_count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
CUresult CUDAAPI cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetCount(int *count) { NOTE(); *count = gpu_count; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) { NOTE(); *device = ordinal; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, size, "%s", gpus[device].name);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { *bytes = gpus[device].mib << 20; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, gpus[device].index + 1, 16);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? gpus[device].major
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? gpus[device].minor
                                                                         : 0;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == CUDA_ERROR_NO_DEVICE   ? "CUDA_ERROR_NO_DEVICE"
                                              : "CUDA_ERROR_UNKNOWN";
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    NOTE();
    *context = (CUcontext)&context_object;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext context) { NOTE(); depth++; return CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext *context) {
    NOTE();
    *context = (CUcontext)&context_object;
    return depth-- > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
#define IN_CONTEXT() do { NOTE(); if (depth < 1) return CUDA_ERROR_INVALID_CONTEXT; } while (0)

CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    IN_CONTEXT();
    *address = (CUdeviceptr)malloc(size);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address) { IN_CONTEXT(); free((void *)address); return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemHostAlloc(void **address, size_t size, unsigned int flags) {
    IN_CONTEXT();
    *address = malloc(size);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemFreeHost(void *address) { IN_CONTEXT(); free(address); return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    IN_CONTEXT();
    *free_bytes = 1 << 20, *total = gpus[0].mib << 20;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    IN_CONTEXT();
    memcpy((void *)target, source, size);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    IN_CONTEXT();
    memcpy(target, (void *)source, size);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    IN_CONTEXT();
    memcpy((void *)target, (void *)source, size);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int flags) {
    IN_CONTEXT();
    *stream = malloc(1);
    return flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream) { IN_CONTEXT(); free(stream); return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) { IN_CONTEXT(); return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) { IN_CONTEXT(); return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    IN_CONTEXT();
    *event = malloc(sizeof(double));
    return flags == CU_EVENT_DEFAULT ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuEventDestroy_v2(CUevent event) { IN_CONTEXT(); free(event); return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) { IN_CONTEXT(); *(double *)event = now += 2.5; return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventSynchronize(CUevent event) { IN_CONTEXT(); return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    IN_CONTEXT();
    *milliseconds = (float)(*(double *)end - *(double *)start);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    IN_CONTEXT();
    return mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    IN_CONTEXT();
    *graph = (CUgraph)&graph_object;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    IN_CONTEXT();
    *executable = (CUgraphExec)&graph_object;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) { IN_CONTEXT(); return CUDA_SUCCESS; }
CUresult CUDAAPI cuGraphLaunch(CUgraphExec executable, CUstream stream) { IN_CONTEXT(); return CUDA_SUCCESS; }
CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec executable) { IN_CONTEXT(); return CUDA_SUCCESS; }

// Like the real driver, it gives the newest version of a function to a caller that asks by the plain name.
CUresult CUDAAPI cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                                     CUdriverProcAddressQueryResult *result) {
    static void *self;
    Dl_info info;
    char name[128];
    if (!self && dladdr((void *)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_LAZY);
    snprintf(name, sizeof(name), "%s_v2", symbol);
    *function = dlsym(self, name);
    if (!*function) *function = dlsym(self, symbol);
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}
