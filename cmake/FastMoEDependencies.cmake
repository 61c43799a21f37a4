# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# Finds what the library and its components need. The build tree and the installed package both include this file, so
# that the same names mean the same thing in both. Nothing is downloaded.

set(FASTMOE_CCCL_INCLUDE_DIR "" CACHE PATH
  "The directory that holds cuda/std/mdspan, where neither a CCCL package nor a CUDA Toolkit shall be looked for")

# Creates FastMoE::cccl: <cuda/std/...> and, beside it, the CUDA runtime's headers where there are any.
# Sets `problem` to what is missing, or to nothing.
function(fastmoe_find_cccl problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET FastMoE::cccl)
    return()
  endif()

  set(roots "${CUDAToolkit_ROOT}" "$ENV{CUDAToolkit_ROOT}" "$ENV{CUDA_PATH}" "$ENV{CUDA_HOME}" /usr/local/cuda)
  list(FILTER roots EXCLUDE REGEX "^$")
  set(include_dirs "")
  if(FASTMOE_CCCL_INCLUDE_DIR)
    if(NOT EXISTS "${FASTMOE_CCCL_INCLUDE_DIR}/cuda/std/mdspan")
      set(${problem} "FASTMOE_CCCL_INCLUDE_DIR is ${FASTMOE_CCCL_INCLUDE_DIR}, which has no cuda/std/mdspan." PARENT_SCOPE)
      return()
    endif()
    set(include_dirs "${FASTMOE_CCCL_INCLUDE_DIR}")
    # In a toolkit and in its wheels, CCCL lies in a folder beside the runtime's headers.
    get_filename_component(beside "${FASTMOE_CCCL_INCLUDE_DIR}" DIRECTORY)
    if(EXISTS "${beside}/cuda_runtime_api.h")
      list(APPEND include_dirs "${beside}")
    endif()
  else()
    if(NOT TARGET CCCL::CCCL)
      # This component alone: CCCL's Thrust target would define a device system for every consumer.
      find_package(CCCL 3.0 QUIET CONFIG COMPONENTS libcudacxx HINTS ${roots} PATH_SUFFIXES lib64/cmake/cccl lib/cmake/cccl)
    endif()
    if(NOT TARGET CCCL::CCCL)
      find_path(FASTMOE_FOUND_CCCL_INCLUDE_DIR cuda/std/mdspan HINTS ${roots} PATH_SUFFIXES include/cccl cccl)
      mark_as_advanced(FASTMOE_FOUND_CCCL_INCLUDE_DIR)
      if(NOT FASTMOE_FOUND_CCCL_INCLUDE_DIR)
        set(${problem} "CCCL (cuda/std/mdspan) was not found. Install the CUDA Toolkit 13.0 or newer, or CCCL 3.0 or newer, and name \
it with CUDAToolkit_ROOT or CCCL_ROOT, or name the headers alone with FASTMOE_CCCL_INCLUDE_DIR." PARENT_SCOPE)
        return()
      endif()
      set(include_dirs "${FASTMOE_FOUND_CCCL_INCLUDE_DIR}")
    endif()
    find_path(FASTMOE_FOUND_CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${roots} PATH_SUFFIXES include)
    mark_as_advanced(FASTMOE_FOUND_CUDA_INCLUDE_DIR)
    if(FASTMOE_FOUND_CUDA_INCLUDE_DIR)
      list(APPEND include_dirs "${FASTMOE_FOUND_CUDA_INCLUDE_DIR}")
    endif()
  endif()

  add_library(FastMoE::cccl INTERFACE IMPORTED GLOBAL)
  if(NOT FASTMOE_CCCL_INCLUDE_DIR AND TARGET CCCL::CCCL)
    target_link_libraries(FastMoE::cccl INTERFACE CCCL::CCCL)
  endif()
  target_include_directories(FastMoE::cccl INTERFACE ${include_dirs})
endfunction()

# Creates FastMoE::<component> on top of FastMoE::fastmoe, and finds only what that component needs.
# Sets `problem` to what is missing, or to nothing.
function(fastmoe_add_component component include_dir problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET FastMoE::${component})
    return()
  endif()

  set(known onednn cuda mpi nccl)
  set(header_of_onednn gemm/onednn.hpp)
  set(header_of_cuda cuda.cuh)
  set(header_of_mpi comm/mpi.hpp)
  set(header_of_nccl cuda/nccl.cuh)
  if(NOT component IN_LIST known)
    set(${problem} "there is no component ${component}; the components are ${known}." PARENT_SCOPE)
    return()
  endif()
  if(NOT EXISTS "${include_dir}/fastmoe/${header_of_${component}}")
    set(${problem} "this version does not have the component ${component} yet (no fastmoe/${header_of_${component}})."
      PARENT_SCOPE)
    return()
  endif()

  if(component STREQUAL "onednn")
    list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
    find_package(oneDNN 2.6 QUIET MODULE)
    set(missing "the component onednn needs oneDNN 2.6 or newer (Debian: libdnnl-dev); name it with oneDNN_ROOT.")
    set(needs DNNL::dnnl)
  elseif(component STREQUAL "cuda")
    find_package(CUDAToolkit 13.0 QUIET)
    set(missing "the component cuda needs the CUDA Toolkit 13.0 or newer; name it with CUDAToolkit_ROOT.")
    set(needs CUDA::cudart)
  elseif(component STREQUAL "mpi")
    find_package(MPI QUIET COMPONENTS CXX)
    set(missing "the component mpi needs an MPI library with its C++ compiler wrapper.")
    set(needs MPI::MPI_CXX)
  elseif(component STREQUAL "nccl")
    fastmoe_add_component(cuda "${include_dir}" missing)
    find_path(FASTMOE_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ${NCCL_ROOT} PATH_SUFFIXES include)
    find_library(FASTMOE_NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} ${NCCL_ROOT} PATH_SUFFIXES lib lib64)
    mark_as_advanced(FASTMOE_NCCL_INCLUDE_DIR FASTMOE_NCCL_LIBRARY)
    if(NOT missing AND FASTMOE_NCCL_INCLUDE_DIR AND FASTMOE_NCCL_LIBRARY AND NOT TARGET FastMoE::nccl_library)
      add_library(FastMoE::nccl_library UNKNOWN IMPORTED GLOBAL)
      set_target_properties(FastMoE::nccl_library PROPERTIES
        IMPORTED_LOCATION "${FASTMOE_NCCL_LIBRARY}"
        INTERFACE_INCLUDE_DIRECTORIES "${FASTMOE_NCCL_INCLUDE_DIR}"
        INTERFACE_LINK_LIBRARIES FastMoE::cuda)
    endif()
    set(missing "the component nccl needs the CUDA Toolkit and NCCL; name it with NCCL_ROOT.")
    set(needs FastMoE::nccl_library)
  endif()
  if(NOT TARGET ${needs})
    set(${problem} "${missing}" PARENT_SCOPE)
    return()
  endif()

  add_library(FastMoE::${component} INTERFACE IMPORTED GLOBAL)
  target_link_libraries(FastMoE::${component} INTERFACE FastMoE::fastmoe ${needs})
  if(component STREQUAL "onednn")
    target_link_libraries(FastMoE::onednn INTERFACE ${oneDNN_OPENMP_LIBRARY})
  elseif(component STREQUAL "cuda")
    # CMake 3.25 does not know cuda_std_20 for this compiler.
    target_compile_options(FastMoE::cuda INTERFACE $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-std=c++20>)
  endif()
endfunction()
