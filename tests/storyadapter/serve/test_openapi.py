"""Whatever is asked of the server that its OpenAPI description allows, or doesn't."""

import schemathesis
from hypothesis import HealthCheck, given, settings


def test_whatever_is_asked_is_no_fault_of_the_server(address: str) -> None:
    asked = set()
    for operation in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(timeout=30)
            assert answer.status_code < 500, (case.body, answer.text)
            asked.add((case.method, case.path))

        ask()
    assert ("POST", "/v1/stories") in asked and ("GET", "/v1/stories/{name}/events") in asked
    assert ("POST", "/v1/uploads") in asked and ("POST", "/v1/stories/{name}/edits") in asked
