# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# Install rules: the headers, and a package that can be moved to another directory or machine.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/FastMoE")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/fastmoe" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS fastmoe EXPORT FastMoETargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT FastMoETargets NAMESPACE FastMoE:: DESTINATION "${package_dir}")

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/FastMoEConfig.cmake.in" "${PROJECT_BINARY_DIR}/FastMoEConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
  PATH_VARS CMAKE_INSTALL_INCLUDEDIR
  NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0 a minor version may change names.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/FastMoEConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES
  "${PROJECT_BINARY_DIR}/FastMoEConfig.cmake"
  "${PROJECT_BINARY_DIR}/FastMoEConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FastMoEDependencies.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FindNCCL.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FindoneDNN.cmake"
  DESTINATION "${package_dir}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
