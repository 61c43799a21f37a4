# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DBUILD= -DPREFIX= -P install_and_move.cmake
# Installs the build tree under a first name and renames the directory: an installed package must not know its path.

file(REMOVE_RECURSE "${PREFIX}" "${PREFIX}.before")
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${PREFIX}.before" COMMAND_ERROR_IS_FATAL ANY
  OUTPUT_QUIET)
file(RENAME "${PREFIX}.before" "${PREFIX}")
