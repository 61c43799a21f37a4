# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DPROGRAM= -DMISTAKE= -DTEXT=<regular expression> -P expect_end.cmake
# Succeeds if the program has computed and then aborted with TEXT; with an empty TEXT, if it has ended well.

execute_process(COMMAND "${PROGRAM}" ${MISTAKE} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE error)
if(NOT output STREQUAL "computed\n")
  message(FATAL_ERROR "The program did not compute; it ended with '${result}' and said:\n${output}${error}")
endif()
if(TEXT STREQUAL "")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "The program ended with '${result}':\n${error}")
  endif()
  return()
endif()
if(NOT result MATCHES "abort|Abort|^134$")
  message(FATAL_ERROR "The program did not abort; it ended with '${result}':\n${error}")
endif()
if(NOT error MATCHES "^${TEXT}")
  message(FATAL_ERROR "The program aborted without saying '${TEXT}':\n${error}")
endif()
