"""The problem document of RFC 9457: the body of every error."""

from __future__ import annotations

from pydantic import BaseModel, Field


class FieldProblem(BaseModel):
    """One parameter that is wrong."""

    name: str
    detail: str


class Problem(BaseModel):
    """RFC 9457, with a stable `code`."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str = Field(description="One sentence with the remedy.")
    instance: str = Field(description="Path of the request.")
    errors: list[FieldProblem] = []
