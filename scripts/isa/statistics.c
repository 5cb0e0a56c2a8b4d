// Compiles compute shaders with the Vulkan driver at hand and prints what its compiler says of them: for each file a line of tab
// separated name=value, beginning with `file=` and `subgroup=`. Arguments: files of SPIR-V, whose entry point is `main`, with a
// uniform buffer as binding 0 and up to 9 storage buffers. A file that is not compiled has `error=`.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

#define BINDINGS 10
#define MOST 64

static void must(VkResult result, const char *what) {
    if (result != VK_SUCCESS) {
        fprintf(stderr, "%s failed: %d\n", what, result);
        exit(1);
    }
}

// The device, with robust buffer access, as wgpu asks for it, and everything that it has of versions 1.1 to 1.3.
static VkDevice open_device(VkPhysicalDevice card) {
    VkPhysicalDeviceCooperativeMatrixFeaturesKHR matrices = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR};
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executables = {
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR, .pNext = &matrices};
    VkPhysicalDeviceVulkan13Features of_13 = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES, .pNext = &executables};
    VkPhysicalDeviceVulkan12Features of_12 = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, .pNext = &of_13};
    VkPhysicalDeviceVulkan11Features of_11 = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, .pNext = &of_12};
    VkPhysicalDeviceFeatures2 features = {VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &of_11};
    vkGetPhysicalDeviceFeatures2(card, &features);
    features.features.robustBufferAccess = VK_TRUE;
    of_12.bufferDeviceAddressCaptureReplay = VK_FALSE;
    matrices.cooperativeMatrixRobustBufferAccess = VK_FALSE;
    const char *extensions[2] = {"VK_KHR_pipeline_executable_properties", "VK_KHR_cooperative_matrix"};
    if (!matrices.cooperativeMatrix) {
        executables.pNext = NULL;
    }
    float priority = 1.0f;
    VkDeviceQueueCreateInfo queue = {
        VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueCount = 1, .pQueuePriorities = &priority};
    VkDeviceCreateInfo info = {
        VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
        .pNext = &features,
        .queueCreateInfoCount = 1,
        .pQueueCreateInfos = &queue,
        .enabledExtensionCount = matrices.cooperativeMatrix ? 2 : 1,
        .ppEnabledExtensionNames = extensions,
    };
    VkDevice device;
    must(vkCreateDevice(card, &info, NULL, &device), "opening the device");
    return device;
}

static VkPipelineLayout layout_of(VkDevice device) {
    VkDescriptorSetLayoutBinding bindings[BINDINGS] = {0};
    for (uint32_t i = 0; i < BINDINGS; i++) {
        bindings[i].binding = i;
        bindings[i].descriptorType = i == 0 ? VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER : VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
        bindings[i].descriptorCount = 1;
        bindings[i].stageFlags = VK_SHADER_STAGE_COMPUTE_BIT;
    }
    VkDescriptorSetLayoutCreateInfo set = {
        VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO, .bindingCount = BINDINGS, .pBindings = bindings};
    VkDescriptorSetLayout sets;
    must(vkCreateDescriptorSetLayout(device, &set, NULL, &sets), "making a layout");
    VkPipelineLayoutCreateInfo info = {VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO, .setLayoutCount = 1, .pSetLayouts = &sets};
    VkPipelineLayout layout;
    must(vkCreatePipelineLayout(device, &info, NULL, &layout), "making a layout");
    return layout;
}

static uint32_t *words_of(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    fseek(file, 0, SEEK_END);
    *bytes = (size_t)ftell(file);
    rewind(file);
    uint32_t *words = malloc(*bytes);
    if (fread(words, 1, *bytes, file) != *bytes) {
        perror(path);
        exit(1);
    }
    fclose(file);
    return words;
}

static void print_statistics(VkDevice device, VkPipeline pipeline) {
    PFN_vkGetPipelineExecutablePropertiesKHR properties =
        (PFN_vkGetPipelineExecutablePropertiesKHR)vkGetDeviceProcAddr(device, "vkGetPipelineExecutablePropertiesKHR");
    PFN_vkGetPipelineExecutableStatisticsKHR statistics =
        (PFN_vkGetPipelineExecutableStatisticsKHR)vkGetDeviceProcAddr(device, "vkGetPipelineExecutableStatisticsKHR");
    VkPipelineInfoKHR of = {VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR, .pipeline = pipeline};
    VkPipelineExecutablePropertiesKHR executables[MOST] = {0};
    uint32_t count = MOST;
    for (uint32_t i = 0; i < MOST; i++) {
        executables[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_PROPERTIES_KHR;
    }
    must(properties(device, &of, &count, executables), "asking for executables");
    // Where there are several, the last is the one that runs.
    VkPipelineExecutableInfoKHR one = {
        VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR, .pipeline = pipeline, .executableIndex = count - 1};
    VkPipelineExecutableStatisticKHR values[MOST] = {0};
    uint32_t known = MOST;
    for (uint32_t i = 0; i < MOST; i++) {
        values[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR;
    }
    must(statistics(device, &one, &known, values), "asking for statistics");
    printf("\tsubgroup=%u", executables[count - 1].subgroupSize);
    for (uint32_t i = 0; i < known; i++) {
        if (values[i].format == VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_FLOAT64_KHR) {
            printf("\t%s=%f", values[i].name, values[i].value.f64);
        } else {
            printf("\t%s=%llu", values[i].name, (unsigned long long)values[i].value.u64);
        }
    }
}

int main(int count, char **files) {
    VkApplicationInfo application = {VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_3};
    VkInstanceCreateInfo create = {VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &application};
    VkInstance instance;
    must(vkCreateInstance(&create, NULL, &instance), "starting the loader");
    uint32_t cards = 1;
    VkPhysicalDevice card;
    VkResult found = vkEnumeratePhysicalDevices(instance, &cards, &card);
    if ((found != VK_SUCCESS && found != VK_INCOMPLETE) || cards == 0) {
        fprintf(stderr, "the driver shows no card: %d\n", found);
        return 1;
    }
    VkDevice device = open_device(card);
    VkPipelineLayout layout = layout_of(device);
    for (int i = 1; i < count; i++) {
        size_t bytes;
        uint32_t *words = words_of(files[i], &bytes);
        printf("file=%s", files[i]);
        VkShaderModuleCreateInfo text = {VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO, .codeSize = bytes, .pCode = words};
        VkShaderModule module;
        must(vkCreateShaderModule(device, &text, NULL, &module), files[i]);
        VkComputePipelineCreateInfo info = {
            VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
            .flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR,
            .stage =
                {
                    VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                    .flags = VK_PIPELINE_SHADER_STAGE_CREATE_ALLOW_VARYING_SUBGROUP_SIZE_BIT,
                    .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                    .module = module,
                    .pName = "main",
                },
            .layout = layout,
        };
        VkPipeline pipeline;
        VkResult made = vkCreateComputePipelines(device, VK_NULL_HANDLE, 1, &info, NULL, &pipeline);
        if (made != VK_SUCCESS) {
            printf("\terror=%d", made);
        } else {
            print_statistics(device, pipeline);
            vkDestroyPipeline(device, pipeline, NULL);
        }
        printf("\n");
        fflush(stdout);
        vkDestroyShaderModule(device, module, NULL);
        free(words);
    }
    return 0;
}
