"""What a query of Prometheus says: the series it reads, and the labels that its result has."""

from __future__ import annotations

from collections.abc import Iterator

import promql_parser as promql

TARGET_LABELS = {"instance", "job"}
"""Prometheus' own, on every series."""


def parse(query: str) -> promql.Expr:
    """Raises ValueError for what is no query, also where a function gets what it cannot take."""
    return promql.parse(query.replace("$__rate_interval", "5m"))


def nodes(expr: promql.Expr) -> list[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(expr, found.append)  # type: ignore[arg-type]
    return found


def selectors(expr: promql.Expr) -> list[promql.VectorSelector]:
    return [node for node in nodes(expr) if isinstance(node, promql.VectorSelector)]


def rates(expr: promql.Expr) -> Iterator[str]:
    """The names of the series whose increase is asked for."""
    for node in nodes(expr):
        if isinstance(node, promql.Call) and node.func.name in ("rate", "irate", "increase"):
            yield from (selector.name for selector in selectors(node))


def result_labels(expr: promql.Expr, labels: dict[str, set[str]]) -> set[str]:
    """`labels` are those of each series. A binary expression's are those of its left side."""
    if isinstance(expr, promql.VectorSelector):
        return labels[expr.name] | TARGET_LABELS
    if isinstance(expr, promql.MatrixSelector):
        return result_labels(expr.vector_selector, labels)
    if isinstance(expr, promql.ParenExpr):
        return result_labels(expr.expr, labels)
    if isinstance(expr, promql.BinaryExpr):
        return result_labels(expr.lhs, labels)
    if isinstance(expr, promql.AggregateExpr):
        if expr.modifier is None:
            return set()
        assert expr.modifier.type == promql.AggModifierType.By, "write `by`: `without` hides labels"
        return set(expr.modifier.labels)
    assert isinstance(expr, promql.Call), f"no labels are known of {expr.prettify()}"
    if expr.func.name == "absent":
        return set()
    within = result_labels(expr.args[-1], labels)
    return within - {"le"} if expr.func.name == "histogram_quantile" else within
