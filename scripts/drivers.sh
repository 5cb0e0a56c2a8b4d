#!/usr/bin/env bash
# Prints every Vulkan driver manifest of this machine, and Chromium's SwiftShader, as the Vulkan loader takes them.
shopt -s nullglob
IFS=:
manifests=(/usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json /usr/lib/chromium/vk_swiftshader_icd.json)
echo "${manifests[*]}"
