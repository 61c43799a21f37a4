# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DCOMPILER= -DSOURCE= -DDIRECTORIES= -P must_fail.cmake
# Succeeds if SOURCE compiles with -DCORRECT, fails without, and the output then matches every "// expect:" line.
# Where the mistake is a flag, lines "// flags: <flags>" say which; each must fail on its own, and -DCORRECT goes without.

file(STRINGS "${SOURCE}" expected REGEX "^// expect: ")
if(NOT expected)
  message(FATAL_ERROR "${SOURCE} has no line '// expect: <regular expression>'")
endif()
file(READ "${SOURCE}" text)
if(NOT text MATCHES "defined\\(CORRECT\\)")
  message(FATAL_ERROR "${SOURCE} does not say under '#if defined(CORRECT)' what would be right")
endif()

set(flags -std=c++20 -fsyntax-only -pthread)
foreach(directory IN LISTS DIRECTORIES)
  list(APPEND flags "-I${directory}")
endforeach()

execute_process(COMMAND "${COMPILER}" ${flags} -DCORRECT "${SOURCE}" RESULT_VARIABLE result ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "The correct form of ${SOURCE} does not compile:\n${output}")
endif()

file(STRINGS "${SOURCE}" mistakes REGEX "^// flags: ")
if(NOT mistakes)
  set(mistakes "// flags: ") # none: the mistake is in the text
endif()
foreach(mistake IN LISTS mistakes)
  string(REGEX REPLACE "^// flags: " "" mistake "${mistake}")
  separate_arguments(wrong UNIX_COMMAND "${mistake}")
  execute_process(COMMAND "${COMPILER}" ${flags} ${wrong} "${SOURCE}" RESULT_VARIABLE result ERROR_VARIABLE output)
  if(result EQUAL 0)
    message(FATAL_ERROR "${SOURCE} compiles, but it must not ${mistake}")
  endif()
  foreach(line IN LISTS expected)
    string(REGEX REPLACE "^// expect: " "" pattern "${line}")
    if(NOT output MATCHES "${pattern}")
      message(FATAL_ERROR "The compiler does not say '${pattern}' about ${SOURCE} ${mistake}; it says:\n${output}")
    endif()
  endforeach()
endforeach()
