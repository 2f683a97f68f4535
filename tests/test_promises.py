"""Which test keeps which promise; the table is checked against the suite, so that none of them can go unnoticed."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# promise: (what it says, the tests that would go red without it)
PROMISES: dict[str, tuple[str, tuple[str, ...]]] = {
    "P1": (
        "operators are symmetric to 16 eps of ||u|| ||Hv||, tested before use",
        ("test_preflight.py::test_healthy_networks_pass", "test_preflight.py::test_broken_networks_are_refused"),
    ),
    "P2": (
        "two products with one vector are bitwise equal on the CPU",
        ("test_preflight.py::test_healthy_networks_pass", "test_preflight.py::test_broken_networks_are_refused"),
    ),
    "P3": (
        "products agree with finite differences in float64 to 1e-5",
        ("test_preflight.py::test_healthy_networks_pass", "test_preflight_rounding.py::test_kinks_do_not_hide_a_detached_term"),
    ),
    "P4": (
        "products agree with a dense Hessian of 15 nets to 1e-10, 1e-5 in float32",
        ("curvature/test_hessian.py::test_products_are_those_of_the_dense_hessian", "curvature/test_hessian.py::test_mutants_are_caught"),
    ),
    "P5": (
        "reported residuals are true ones, to 1 % + 10 n eps ||H||; none is falsely converged",
        (
            "test_properties.py::test_P5_reported_residuals_are_those_of_the_dense_hessian_and_none_is_falsely_converged",
            "krylov/test_families.py::test_every_result_is_sound_at_every_budget",
            "krylov/test_restart.py::test_results_of_restarted_runs_are_sound_on_every_family",
        ),
    ),
    "P6": (
        "LAPACK's ratios are at most 10 on every family",
        (
            "krylov/test_families.py::test_every_result_is_sound_at_every_budget",
            "krylov/test_families.py::test_D5_recurrence_to_the_full_space_is_orthonormal_and_has_no_ghosts",
        ),
    ),
    "P7": (
        "no ghosts: multiplicity never above the truth",
        (
            "krylov/test_families.py::test_D5_recurrence_to_the_full_space_is_orthonormal_and_has_no_ghosts",
            "krylov/test_families.py::test_ghost_check_goes_red_without_reorthogonalisation",
            "test_bad_input_solver.py::test_D5_long_runs_have_no_ghosts",
        ),
    ),
    "P8": (
        "a power of two changes no bit, any factor ten roundings, 1e-30 to 1e30 in float32",
        (
            "test_properties.py::test_P8_a_power_of_two_before_the_loss_changes_no_bit",
            "test_properties.py::test_P8_losses_of_any_size_in_float32",
            "krylov/test_families.py::test_C6_scale_by_a_power_of_two_is_bitwise_equivariant",
            "krylov/test_families.py::test_P8_results_stay_finite_and_sound_at_the_ends_of_the_range",
        ),
    ),
    "P9": (
        "order of samples 8 eps, split into batches 1e-6 (1e-13 in float64), sum against mean 4 eps",
        (
            "curvature/test_hessian.py::test_order_of_samples_does_not_matter",
            "curvature/test_hessian.py::test_uneven_batches_equal_one_big_batch",
            "curvature/test_hessian.py::test_sum_is_sample_count_times_mean",
        ),
    ),
    "P10": (
        "what did not converge is returned, labelled, warned of; an error with strict=True",
        (
            "krylov/test_contract.py::test_P10_not_converged_warns_at_the_callers_line_with_labelled_pairs",
            "krylov/test_contract.py::test_P10_strict_raises_with_the_same_pairs",
            "test_api.py::test_not_converged_warns_or_raises_with_what_there_is",
        ),
    ),
    "P11": (
        "weights add up to 1 +- 1e-6, densities to 1 +- 1e-3, 95 % intervals cover as often as they say",
        (
            "test_density.py::test_P11_weights_sum_to_one_and_the_density_integrates_to_one",
            "krylov/test_trace_coverage.py::test_intervals_of_the_trace",
            "krylov/test_trace_coverage.py::test_intervals_of_traces_of_functions",
            "krylov/test_trace.py::test_signs_are_treated_alike",
        ),
    ),
    "P12": (
        "a result says what is not promised",
        (
            "test_properties.py::test_P12_results_say_what_is_not_promised_and_the_documentation_says_the_same",
            "test_properties.py::test_P12_notes_of_a_result_name_kinks_and_an_unsettled_list",
            "test_properties.py::test_P12_operations_with_kinks_are_noted_and_no_others",
        ),
    ),
    "P13": (
        "every row of the catalogue of bad input ends as stated",
        (
            "test_catalogue.py::test_P13_every_row_has_a_test_inside_the_one_fixture",
            "test_catalogue.py::test_P13_the_page_names_the_errors_that_the_tests_expect",
        ),
    ),
    "P14": (
        "messages name the object, the cause and one thing to do, in five lines, with a code",
        (
            "test_messages.py::test_P14_message_names_the_object_the_cause_and_one_thing_to_do",
            "test_messages.py::test_P14_every_class_has_its_call",
        ),
    ),
    "P15": (
        "no side effects, on return, on an error, on Ctrl-C",
        (
            "test_guard.py::test_success_leaves_no_trace",
            "test_guard.py::test_failure_leaves_no_trace",
            "test_api.py::test_ctrl_c_at_any_product_leaves_no_trace_and_carries_the_pairs_so_far",
            "test_api.py::test_ctrl_c_in_the_loss_leaves_no_trace",
        ),
    ),
    "P16": (
        "no tensor stays alive; less than 1 MB of growth in 1,000 calls",
        (
            "test_properties.py::test_P16_fifty_calls_leave_no_tensor_alive",
            "test_properties.py::test_P16_memory_does_not_drift",
            "curvature/test_bad_input_products.py::test_operators_in_a_loop_leave_no_tensor_behind",
        ),
    ),
    "P20": ("no false alarm over 30 pairs of model and loader", ("test_false_alarms.py::test_P20_no_false_alarm",)),
}


@functools.cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_tests_of_a_promise_are_there(promise: str) -> None:
    _, tests = PROMISES[promise]
    missing = [test for test in tests if test.partition("::")[2] not in names_in(test.partition("::")[0])]
    assert tests and not missing, f"{promise} rests on tests that are gone: {missing}"


def test_every_promise_and_every_test_named_after_one_is_in_the_table() -> None:
    assert [*PROMISES] == [f"P{i}" for i in range(1, 17)] + ["P20"]
    named = {
        (path.relative_to(TESTS).as_posix(), name) for path in TESTS.rglob("test_*.py") for name in names_in(str(path.relative_to(TESTS)))
    }
    for file, name in named:
        promise = name.removeprefix("test_").partition("_")[0]
        if promise in PROMISES:
            files = {test.partition("::")[0] for test in PROMISES[promise][1]}
            assert file in files, f"{file}::{name} is named after {promise}, whose tests are in {sorted(files)}"
