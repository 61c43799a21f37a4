# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DTEXT=<regular expression> -P expect_failure.cmake -- command...
# Succeeds if the command fails and says TEXT.

set(command "")
set(after FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(after)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(after TRUE)
  endif()
endforeach()

execute_process(COMMAND ${command} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "The command succeeded, but it must not:\n${output}")
endif()
string(REGEX REPLACE "[ \n]+" " " output "${output}") # CMake breaks lines where it likes
if(NOT output MATCHES "${TEXT}")
  message(FATAL_ERROR "The command failed without saying '${TEXT}':\n${output}")
endif()
