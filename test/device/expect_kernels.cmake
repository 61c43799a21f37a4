# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# cmake -DOBJECT= -P expect_kernels.cmake
# Succeeds if the object holds a kernel of each of these functors, in bfloat16 where values are in the tensors' type.

file(STRINGS "${OBJECT}" kernels REGEX "run_(rows|elements)I")
list(REMOVE_DUPLICATES kernels)
list(LENGTH kernels found)
foreach(functor IN ITEMS
    choose_row check_few bucket_rank place_choices plan_offsets router_sums router_loss_gradient weigh_row_backward
    keep_greatest look_up draw_experts count_up fill
    multiply_row.*bfloat16.*activate multiply_row.*bfloat16.*activate_backward multiply_row.*half multiply_weight_row.*bfloat16
    gather_rows.*bfloat16 sum_row_lists.*bfloat16 sum_group_columns.*bfloat16)
  if(NOT kernels MATCHES "run_(rows|elements)I[^;]*${functor}")
    message(FATAL_ERROR "There is no kernel of ${functor} among the ${found} symbols of ${OBJECT}")
  endif()
endforeach()
message("${found} symbols of kernels")
