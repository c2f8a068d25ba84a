"""Requests made up from the OpenAPI description: whatever is sent, the answer is one that is described."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
CASES = int(os.environ.get("RECLOOP_TEST_CASES", "10000"))
"""In all, over all routes."""


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_whatever_is_sent_the_answer_is_one_that_is_described(alone):
    description = schemathesis.openapi.from_url(f"{alone.url}/openapi.json")
    alone.recommend("warm", interests="anything")  # the model takes longer to load than a request is waited for
    operations = [found.ok() for found in description.get_all_operations()]
    asked, wrong = 0, {}
    for operation in operations:

        @settings(
            max_examples=-(-3 * CASES // (2 * len(operations))),  # of small requests there are not so many
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case):
            nonlocal asked
            asked += 1
            case.call_and_validate(checks=CHECKS)

        try:
            ask()
        except (
            Exception,
            BaseExceptionGroup,
        ) as error:  # of any kind: what is wrong with one route must not hide another's
            parts = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
            wrong[operation.label] = [f"{part!r:.300} {part}" for part in parts]
    assert not wrong, "\n".join(f"{label}: {text}" for label, found in wrong.items() for text in found)
    assert asked >= CASES
