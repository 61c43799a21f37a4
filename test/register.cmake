# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# How tests are told to ctest. What a machine cannot run is reported as skipped, with the reason, and never as passed:
#
#   fastmoe_add_unit_test(name target [DEVICES device filter ...])   a program of test/main.cpp
#   fastmoe_add_skipped_test(name reason label)                      a test that cannot be built here

# With DEVICES, the test cases that doctest's filter names are a test of their own, `name.device`: where there is no such
# device that one is skipped, and the others still pass. CONFIGURATIONS is add_test's.
function(fastmoe_add_unit_test name target)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "DEVICES;CONFIGURATIONS")
  set(configurations "")
  if(arg_CONFIGURATIONS)
    set(configurations CONFIGURATIONS ${arg_CONFIGURATIONS})
  endif()
  set(tests ${name})
  set(without "")
  while(arg_DEVICES)
    list(POP_FRONT arg_DEVICES device filter)
    add_test(NAME ${name}.${device} ${configurations} COMMAND ${target} "--test-case=${filter}")
    list(APPEND tests ${name}.${device})
    list(APPEND without "${filter}")
  endwhile()
  list(JOIN without "," without)
  if(without)
    add_test(NAME ${name} ${configurations} COMMAND ${target} "--test-case-exclude=${without}")
  else()
    add_test(NAME ${name} ${configurations} COMMAND ${target})
  endif()
  set_tests_properties(${tests} PROPERTIES TIMEOUT ${FASTMOE_TEST_TIMEOUT} LABELS unit SKIP_RETURN_CODE 77
    FIXTURES_SETUP unit_tests)
  if("${name}.cuda" IN_LIST tests AND NOT FASTMOE_TEST_EMULATED) # a kernel that never ends is not to hold up the others
    set_tests_properties(${name}.cuda PROPERTIES TIMEOUT 90)
  endif()
  foreach(test IN LISTS tests) # see test/functors
    set_tests_properties(${test} PROPERTIES ENVIRONMENT "FASTMOE_LANES_LOG=${CMAKE_BINARY_DIR}/lanes/${test}")
  endforeach()
endfunction()

function(fastmoe_add_skipped_test name reason label)
  add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E echo "skipped: ${reason}")
  set_tests_properties(${name} PROPERTIES LABELS ${label} SKIP_REGULAR_EXPRESSION "^skipped: ")
endfunction()
