# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DSOURCE= -DBUILD= -DPRESET= -DSETTINGS= -P configure.cmake
# Succeeds if the preset configures into BUILD without a warning, and `--build` and ctest know one of its name.

foreach(kind IN ITEMS build test)
  execute_process(COMMAND "${CMAKE_COMMAND}" "--list-presets=${kind}" WORKING_DIRECTORY "${SOURCE}" OUTPUT_VARIABLE known)
  if(NOT known MATCHES "\"${PRESET}\"")
    message(FATAL_ERROR "There is no ${kind} preset ${PRESET}:\n${known}")
  endif()
endforeach()

file(REMOVE_RECURSE "${BUILD}")
execute_process(COMMAND "${CMAKE_COMMAND}" --preset ${PRESET} -B "${BUILD}" ${SETTINGS} WORKING_DIRECTORY "${SOURCE}"
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0 OR output MATCHES "CMake Warning")
  message(FATAL_ERROR "The preset ${PRESET} does not configure:\n${output}")
endif()
if(NOT EXISTS "${BUILD}/build.ninja")
  message(FATAL_ERROR "The preset ${PRESET} has made nothing to build in ${BUILD}:\n${output}")
endif()
