# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DCTEST= -DBUILD= -P expect_reports.cmake
# Succeeds if ctest reports each inner test as it must.

execute_process(COMMAND "${CTEST}" --test-dir "${BUILD}" -C Inner -R "^inner[.]" OUTPUT_VARIABLE output ERROR_VARIABLE output)
foreach(expected IN ITEMS
    "inner\\.split \\.+ +Passed"             # what this machine has
    "inner\\.split\\.nowhere \\.+\\*\\*\\*Skipped" # what it has not
    "inner\\.all \\.+\\*\\*\\*Skipped"             # all that it has needs the device
    "inner\\.whole \\.+\\*\\*\\*Skipped"           # not told apart, so nothing is said to have passed
    "inner\\.failing \\.+\\*\\*\\*Failed"          # a skip hides no failure
    "inner\\.none\\.nowhere \\.+\\*\\*\\*Failed"   # a filter that matches nothing is no success
    )
  if(NOT output MATCHES "${expected}")
    message(FATAL_ERROR "ctest does not report '${expected}'; it reports:\n${output}")
  endif()
endforeach()
