// Stands in for CUDA's driver (libcuda.so.1) in test_device_memory.py: device memory is the host's, there is one
// device, number 3, and every call but the first four refuses (201) a thread in which its context is not current.
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef unsigned long long Address;
struct Handle {
  unsigned char reserved[64];
};

static thread_local void *current;
static Address base;
static size_t size;
static int mapped, locked;
static void *last_stream;

#define CALL extern "C" int
#define NEEDS_CONTEXT \
  if (current != (void *)103) return 201

CALL cuInit(unsigned flags) { return flags; }

CALL cuDeviceGet(int *device, int index) {
  *device = index;
  return index == 3 ? 0 : 101;
}

CALL cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)(intptr_t)(100 + device);
  return 0;
}

CALL cuCtxSetCurrent(void *context) {
  current = context;
  return 0;
}

CALL cuMemAlloc_v2(Address *address, size_t nbytes) {
  NEEDS_CONTEXT;
  if (nbytes > (1ull << 40)) return 2;
  *address = base = (Address)calloc(1, size = nbytes);
  return 0;
}

CALL cuMemFree_v2(Address address) {
  NEEDS_CONTEXT;
  if (address != base) return 1;
  free((void *)address);
  base = 0;
  return 0;
}

CALL cuMemGetAddressRange_v2(Address *from, size_t *nbytes, Address address) {
  NEEDS_CONTEXT;
  *from = base;
  *nbytes = size;
  return address < base ? 500 : 0;
}

CALL cuPointerGetAttribute(void *to, int what, Address address) {
  NEEDS_CONTEXT;
  if (what == 11) *(Address *)to = address;
  if (what == 12) *(size_t *)to = 77;
  return what == 11 || what == 12 ? 0 : 1;
}

CALL cuIpcGetMemHandle(Handle *handle, Address address) {
  NEEDS_CONTEXT;
  for (int i = 0; i < 64; i++) handle->reserved[i] = i % 3;
  memcpy(handle->reserved + 56, &address, 8);
  return 0;
}

CALL cuIpcOpenMemHandle_v2(Address *address, Handle handle, unsigned flags) {
  NEEDS_CONTEXT;
  if (flags != 1) return 1;
  for (int i = 0; i < 56; i++)
    if (handle.reserved[i] != i % 3) return 400;
  memcpy(address, handle.reserved + 56, 8);
  mapped++;
  return 0;
}

CALL cuIpcCloseMemHandle(Address address) {
  NEEDS_CONTEXT;
  if (address != base) return 1;
  mapped--;
  return 0;
}

static int copied(void *to, const void *from, size_t nbytes, void *stream) {
  NEEDS_CONTEXT;
  memcpy(to, from, nbytes);
  last_stream = stream;
  return 0;
}

CALL cuMemcpyAsync(Address to, Address from, size_t nbytes, void *stream) {
  return copied((void *)to, (void *)from, nbytes, stream);
}

CALL cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t nbytes, void *stream) {
  return copied((void *)to, from, nbytes, stream);
}

CALL cuMemcpyDtoHAsync_v2(void *to, Address from, size_t nbytes, void *stream) {
  return copied(to, (void *)from, nbytes, stream);
}

CALL cuMemHostRegister_v2(void *memory, size_t nbytes, unsigned flags) {
  NEEDS_CONTEXT;
  if (!memory || flags != 1) return 1;
  locked += nbytes;
  return 0;
}

CALL cuMemHostUnregister(void *memory) {
  NEEDS_CONTEXT;
  locked = 0;
  return memory ? 0 : 1;
}

CALL cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : 0;
  return code != 2;
}

// What was done: lanes mapped, bytes locked, the stream of the last copy.
extern "C" int state(int what) { return what == 0 ? mapped : what == 1 ? locked : (int)(intptr_t)last_stream; }
