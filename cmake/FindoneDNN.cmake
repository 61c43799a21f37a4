# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# Finds oneDNN by header and library and creates DNNL::dnnl, the name that oneDNN's own package uses.
# That package is not used: as some distributions build it, it demands OpenCL's development files, which nobody needs.

find_path(oneDNN_INCLUDE_DIR oneapi/dnnl/dnnl.hpp)
find_library(oneDNN_LIBRARY dnnl)
mark_as_advanced(oneDNN_INCLUDE_DIR oneDNN_LIBRARY)

set(oneDNN_VERSION "")
if(oneDNN_INCLUDE_DIR)
  file(STRINGS "${oneDNN_INCLUDE_DIR}/oneapi/dnnl/dnnl_version.h" version_lines REGEX "#define DNNL_VERSION_[A-Z]+ ")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    if(version_lines MATCHES "DNNL_VERSION_${part} ([0-9]+)")
      list(APPEND oneDNN_VERSION ${CMAKE_MATCH_1})
    endif()
  endforeach()
  list(JOIN oneDNN_VERSION "." oneDNN_VERSION)
  unset(version_lines)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(oneDNN
  REQUIRED_VARS oneDNN_LIBRARY oneDNN_INCLUDE_DIR
  VERSION_VAR oneDNN_VERSION)

# The OpenMP runtime that this library uses, so that a program sets the threads of that one and not of another.
if(oneDNN_FOUND AND NOT DEFINED CACHE{oneDNN_OPENMP_LIBRARY})
  set(openmp gomp)
  if(CMAKE_READELF)
    execute_process(COMMAND "${CMAKE_READELF}" -d "${oneDNN_LIBRARY}" OUTPUT_VARIABLE needed ERROR_QUIET)
    if(needed MATCHES "\\[lib(gomp|iomp5|omp)\\.so")
      set(openmp ${CMAKE_MATCH_1})
    endif()
    unset(needed)
  endif()
  set(oneDNN_OPENMP_LIBRARY ${openmp} CACHE STRING "The OpenMP runtime of oneDNN")
  mark_as_advanced(oneDNN_OPENMP_LIBRARY)
  unset(openmp)
endif()

if(oneDNN_FOUND AND NOT TARGET DNNL::dnnl)
  add_library(DNNL::dnnl UNKNOWN IMPORTED GLOBAL)
  set_target_properties(DNNL::dnnl PROPERTIES
    IMPORTED_LOCATION "${oneDNN_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${oneDNN_INCLUDE_DIR}")
endif()
