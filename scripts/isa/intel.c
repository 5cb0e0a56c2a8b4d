// Makes Mesa's Intel driver believe that there is an Intel card, so that it compiles shaders for one; nothing ever runs on it.
// To be loaded before Mesa's own shim for AMD, which invents the render node: here its ids read as Intel's, and what the driver
// asks of the kernel is answered as i915 would. INTEL_PCI is the device id in hexadecimal (default 56a0, an Arc A770).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <drm.h>
#include <i915_drm.h>

// Render slices, halves of them that share a sampler, and execution units of each: an Arc A770's.
enum { SLICES = 8, SUBSLICES = 4, UNITS = 16 };
static const uint64_t HOST_MEMORY = 32ull << 30, CARD_MEMORY = 16ull << 30;

static int nodes[64], node_count;
static uint32_t last_handle;

static int is_node(int file) {
    for (int i = 0; i < node_count; i++) {
        if (nodes[i] == file) {
            return 1;
        }
    }
    return 0;
}

static int pci_device(void) {
    const char *text = getenv("INTEL_PCI");
    return text ? (int)strtol(text, NULL, 16) : 0x56a0;
}

// The files below /sys/dev/char/226:*/device say whose card it is.
FILE *fopen(const char *path, const char *mode) {
    static FILE *(*next)(const char *, const char *);
    if (!next) {
        next = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, "fopen");
    }
    if (strstr(path, "226:") && strstr(path, "/device/")) {
        static char texts[5][16];
        const char *name = strrchr(path, '/') + 1;
        const char *names[] = {"vendor", "device", "subsystem_vendor", "subsystem_device", "revision"};
        const int values[] = {0x8086, pci_device(), 0x8086, 0x1020, 8};
        for (int i = 0; i < 5; i++) {
            if (strcmp(name, names[i]) == 0) {
                snprintf(texts[i], sizeof texts[i], "0x%04x\n", values[i]);
                return fmemopen(texts[i], strlen(texts[i]), "r");
            }
        }
    }
    return next(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    return fopen(path, mode);
}

static void set_bits(uint8_t *bytes, int count) {
    for (int i = 0; i < count; i++) {
        bytes[i / 8] |= (uint8_t)(1u << (i % 8));
    }
}

// Answers are asked for twice: first their length, then they themselves.
static void answer_topology(struct drm_i915_query_item *item) {
    enum { SLICE_BYTES = (SLICES + 7) / 8, SUBSLICE_BYTES = (SUBSLICES + 7) / 8, UNIT_BYTES = (UNITS + 7) / 8 };
    struct drm_i915_query_topology_info *info = (void *)(uintptr_t)item->data_ptr;
    int length = sizeof *info + SLICE_BYTES + SLICES * SUBSLICE_BYTES + SLICES * SUBSLICES * UNIT_BYTES;
    if (item->length == 0) {
        item->length = length;
        return;
    }
    memset(info, 0, (size_t)length);
    info->max_slices = SLICES;
    info->max_subslices = SUBSLICES;
    info->max_eus_per_subslice = UNITS;
    info->subslice_offset = SLICE_BYTES;
    info->subslice_stride = SUBSLICE_BYTES;
    info->eu_offset = SLICE_BYTES + SLICES * SUBSLICE_BYTES;
    info->eu_stride = UNIT_BYTES;
    set_bits(info->data, SLICES);
    for (int i = 0; i < SLICES; i++) {
        set_bits(info->data + info->subslice_offset + i * SUBSLICE_BYTES, SUBSLICES);
    }
    for (int i = 0; i < SLICES * SUBSLICES; i++) {
        set_bits(info->data + info->eu_offset + i * UNIT_BYTES, UNITS);
    }
}

static void answer_engines(struct drm_i915_query_item *item) {
    struct drm_i915_query_engine_info *info = (void *)(uintptr_t)item->data_ptr;
    const int classes[] = {I915_ENGINE_CLASS_RENDER, I915_ENGINE_CLASS_COPY, 4 /* compute */};
    int length = sizeof *info + 3 * sizeof info->engines[0];
    if (item->length == 0) {
        item->length = length;
        return;
    }
    memset(info, 0, (size_t)length);
    info->num_engines = 3;
    for (int i = 0; i < 3; i++) {
        info->engines[i].engine.engine_class = (uint16_t)classes[i];
    }
}

static void answer_memory(struct drm_i915_query_item *item) {
    struct drm_i915_query_memory_regions *info = (void *)(uintptr_t)item->data_ptr;
    const uint64_t sizes[] = {HOST_MEMORY, CARD_MEMORY};
    int length = sizeof *info + 2 * sizeof info->regions[0];
    if (item->length == 0) {
        item->length = length;
        return;
    }
    memset(info, 0, (size_t)length);
    info->num_regions = 2;
    for (int i = 0; i < 2; i++) {
        info->regions[i].region.memory_class = (uint16_t)i;
        info->regions[i].probed_size = sizes[i];
        info->regions[i].unallocated_size = sizes[i];
        info->regions[i].probed_cpu_visible_size = sizes[i];
        info->regions[i].unallocated_cpu_visible_size = sizes[i];
    }
}

static void answer(struct drm_i915_query *query) {
    struct drm_i915_query_item *items = (void *)(uintptr_t)query->items_ptr;
    for (uint32_t i = 0; i < query->num_items; i++) {
        switch (items[i].query_id & 0xffff) {
        case DRM_I915_QUERY_TOPOLOGY_INFO:
        case 6: // of one engine's subslices
            answer_topology(&items[i]);
            break;
        case DRM_I915_QUERY_ENGINE_INFO:
            answer_engines(&items[i]);
            break;
        case DRM_I915_QUERY_MEMORY_REGIONS:
            answer_memory(&items[i]);
            break;
        default:
            items[i].length = -EINVAL;
        }
    }
}

static int parameter(int name) {
    switch (name) {
    case I915_PARAM_CHIPSET_ID:
        return pci_device();
    case I915_PARAM_REVISION:
        return 8;
    case I915_PARAM_CS_TIMESTAMP_FREQUENCY:
        return 19200000;
    case I915_PARAM_HAS_ALIASING_PPGTT:
        return 3;
    case I915_PARAM_MMAP_VERSION:
    case I915_PARAM_MMAP_GTT_VERSION:
        return 4;
    case I915_PARAM_SUBSLICE_TOTAL:
        return SLICES * SUBSLICES;
    case I915_PARAM_EU_TOTAL:
        return SLICES * SUBSLICES * UNITS;
    case I915_PARAM_SLICE_MASK:
        return (1 << SLICES) - 1;
    case I915_PARAM_SUBSLICE_MASK:
        return (1 << SUBSLICES) - 1;
    case I915_PARAM_NUM_FENCES_AVAIL:
        return 32;
    case I915_PARAM_CMD_PARSER_VERSION:
        return 10;
    case I915_PARAM_PERF_REVISION:
        return 5;
    default:
        return 1;
    }
}

static void name_driver(struct drm_version *version) {
    version->version_major = 1;
    version->version_minor = 6;
    if (version->name) {
        strncpy(version->name, "i915", version->name_len);
    }
    if (version->date) {
        strncpy(version->date, "20201103", version->date_len);
    }
    if (version->desc) {
        strncpy(version->desc, "Intel Graphics", version->desc_len);
    }
    version->name_len = 4;
    version->date_len = 8;
    version->desc_len = 14;
}

// What i915 alone is asked; everything else that only has to succeed does.
static void command(unsigned number, void *argument) {
    switch (number) {
    case DRM_I915_GETPARAM: {
        drm_i915_getparam_t *asked = argument;
        *asked->value = parameter(asked->param);
        break;
    }
    case DRM_I915_QUERY:
        answer(argument);
        break;
    case DRM_I915_GEM_CREATE:
        ((struct drm_i915_gem_create *)argument)->handle = ++last_handle;
        break;
    case 0x3c: // GEM_CREATE_EXT
        ((uint32_t *)argument)[2] = ++last_handle;
        break;
    case DRM_I915_GEM_USERPTR:
        ((struct drm_i915_gem_userptr *)argument)->handle = ++last_handle;
        break;
    case DRM_I915_GEM_MMAP_GTT: {
        struct drm_i915_gem_mmap_offset *map = argument;
        map->offset = (uint64_t)map->handle << 32;
        break;
    }
    case DRM_I915_GEM_CONTEXT_CREATE:
        ((struct drm_i915_gem_context_create_ext *)argument)->ctx_id = 1;
        break;
    case DRM_I915_GEM_CONTEXT_GETPARAM: {
        struct drm_i915_gem_context_param *asked = argument;
        asked->value = asked->param == I915_CONTEXT_PARAM_GTT_SIZE ? 1ull << 48 : 0;
        break;
    }
    case DRM_I915_GEM_VM_CREATE:
        ((struct drm_i915_gem_vm_control *)argument)->vm_id = 1;
        break;
    case DRM_I915_GEM_GET_APERTURE: {
        struct drm_i915_gem_get_aperture *aperture = argument;
        aperture->aper_size = aperture->aper_available_size = 1ull << 48;
        break;
    }
    case DRM_I915_REG_READ:
        ((struct drm_i915_reg_read *)argument)->val = 0;
        break;
    }
}

int ioctl(int file, unsigned long request, ...) {
    static int (*next)(int, unsigned long, ...);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (!next) {
        next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    }
    if (_IOC_TYPE(request) != DRM_IOCTL_BASE) {
        return next(file, request, argument);
    }
    if (!is_node(file) && node_count < 64) {
        nodes[node_count++] = file;
    }
    unsigned number = _IOC_NR(request);
    if (number == _IOC_NR(DRM_IOCTL_VERSION)) {
        name_driver(argument);
    } else if (number == _IOC_NR(DRM_IOCTL_GET_CAP)) {
        struct drm_get_cap *asked = argument;
        int shared = asked->capability == DRM_CAP_SYNCOBJ || asked->capability == DRM_CAP_SYNCOBJ_TIMELINE;
        asked->value = asked->capability == DRM_CAP_PRIME ? 3 : (uint64_t)shared;
    } else if (number == _IOC_NR(DRM_IOCTL_SYNCOBJ_CREATE)) {
        ((struct drm_syncobj_create *)argument)->handle = ++last_handle;
    } else if (number >= DRM_COMMAND_BASE && number < DRM_COMMAND_END) {
        command(number - DRM_COMMAND_BASE, argument);
    }
    return 0;
}

// Memory of the card is memory of this process.
static void *map(const char *name, void *at, size_t length, int protection, int flags, int file, off_t offset) {
    void *(*next)(void *, size_t, int, int, int, off_t) =
        (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, name);
    if (file >= 0 && is_node(file)) {
        flags = (flags & ~(MAP_SHARED | MAP_SHARED_VALIDATE)) | MAP_PRIVATE | MAP_ANONYMOUS;
        return next(at, length, protection, flags, -1, 0);
    }
    return next(at, length, protection, flags, file, offset);
}

void *mmap(void *at, size_t length, int protection, int flags, int file, off_t offset) {
    return map("mmap", at, length, protection, flags, file, offset);
}

void *mmap64(void *at, size_t length, int protection, int flags, int file, off_t offset) {
    return map("mmap64", at, length, protection, flags, file, offset);
}
