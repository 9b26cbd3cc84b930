"""The text of an answer -> the message that it is: reasoning, content, tool calls."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pjengine.sampling_params import SamplingParams
from pjengine.serving.errors import ApiError
from pjengine.serving.forced_calls import NamedCallParser, RequiredCallsParser, forced_form
from pjengine.serving.prompt_reader import PromptReader
from pjengine.serving.protocol import ChatRequest
from pjengine.serving.reasoning import REASONING_PARSERS, ReasoningParser
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.strict_calls import strict_grammar
from pjengine.serving.text_parser import Call, Parts
from pjengine.serving.tool_parser import ToolParser
from pjengine.serving.tool_parsers import TOOL_PARSERS
from pjengine.serving.tool_schemas import calls_schema
from pjengine.structured_outputs import StructuredOutputsParams


class MessageReader:
    """Reads one answer, in pieces or at once; calls are looked for in what follows the reasoning."""

    def __init__(
        self, reasoning: ReasoningParser | None, calls: ToolParser | None, *, is_parallel: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._is_parallel = is_parallel  # else the first call is the only one
        self.has_called = False

    def push(self, text: str, *, is_last: bool) -> Parts:
        """What the next piece of the text settles."""
        parts = _parse(self._reasoning, text, is_last)
        found = _parse(self._calls, parts.content, is_last)
        self.has_called |= bool(found.calls)
        calls = [call for call in found.calls if self._is_parallel or call.index == 0]
        return Parts(parts.reasoning, found.content, calls)


def _parse(parser: ReasoningParser | ToolParser | None, text: str, is_last: bool) -> Parts:
    if parser is None:
        return Parts(content=text)
    parts = parser.push(text)
    return parts.add(parser.finish()) if is_last else parts


class MessageForm:
    """How answers to a request are to be read, and what that asks of the engine.

    Raises:
      ApiError: the server was not told how its model calls tools, or where its reasoning ends.
    """

    def __init__(self, body: ChatRequest, config: ServerConfig) -> None:
        self._body = body
        own = TOOL_PARSERS.get(config.tool_call_parser or "")
        self._make_id = (own or ToolParser).new_id
        forced = {"required": RequiredCallsParser, "named": NamedCallParser}.get(body.way)
        self._calls: type[ToolParser] | None = forced or (own if body.way == "auto" else None)
        self._is_forced = forced is not None
        self._reasoning = REASONING_PARSERS.get(config.reasoning_parser or "")
        self.shows_reasoning = config.reasoning_parser is not None and body.include_reasoning
        if body.way == "auto" and not config.enable_auto_tool_choice:
            raise ApiError(
                400,
                'tool_choice="auto" needs a server that was started with --enable-auto-tool-choice and '
                '--tool-call-parser; "required", or a function by its name, needs neither',
                param="tool_choice",
            )
        if not body.include_reasoning and config.reasoning_parser is None:
            raise ApiError(
                400,
                "include_reasoning=false needs a server that was started with --reasoning-parser",
                param="include_reasoning",
            )

    def reader(self, prompt: str) -> MessageReader:
        """For one answer to a prompt."""
        body = self._body
        schemas = {own.name: own.schema_of_arguments for own in body.callable_functions}
        return MessageReader(
            self._reasoning_after(prompt),
            None if self._calls is None else self._calls(schemas, self._make_id),
            is_parallel=body.parallel_tool_calls,
        )

    def _reasoning_after(self, prompt: str) -> ReasoningParser | None:
        body = self._body
        begun = body.messages[-1].text if body.continue_final_message else ""
        return None if self._reasoning is None else self._reasoning(prompt, begun)

    def sampling_params(self, params: SamplingParams, prompts: PromptReader) -> SamplingParams:
        """Those of the request: marks must be seen, and calls may have to hold to schemas."""
        if self._is_forced and self._reasoning is not None and prompts.has_special(self._reasoning.marks):
            self._reasoning = None  # grammars know marks as text only: such a model does not think first
        parsers = (self._reasoning, self._calls)
        marks = [mark for parser in parsers if parser is not None for mark in parser.marks]
        are_special = prompts.has_special(marks)
        if are_special:
            params = dataclasses.replace(params, skip_special_tokens=False)
        if not self._body.are_calls_formed:
            return params
        if params.structured_outputs is not None:
            raise ApiError(
                400,
                "calls that hold to the schemas of their tools leave no room for another form of the output",
                param="tools",
            )
        return dataclasses.replace(params, structured_outputs=self._checked_form(not are_special))

    def _checked_form(self, are_marks_text: bool) -> StructuredOutputsParams:
        """Raises ApiError for schemas that are too long, or are no Unicode; it names the tool."""
        try:
            for function in self._body.callable_functions:
                if function.strict or self._body.way != "auto":
                    place = f"tools: the parameters of {function.name!r}"
                    StructuredOutputsParams(json=function.schema_of_arguments)
            place = "tools: their parameters, together"
            return self._form_of_calls(are_marks_text=are_marks_text)
        except ValueError as error:
            raise ApiError(400, f"{place}: {error}", param="tools") from error

    def _form_of_calls(self, *, are_marks_text: bool) -> StructuredOutputsParams:
        body, functions = self._body, self._body.callable_functions
        is_one = not body.parallel_tool_calls
        if self._is_forced:
            return forced_form(self._forced_schema())
        assert self._calls is not None
        grammar = strict_grammar(self._calls, functions, is_one=is_one) if are_marks_text else None
        if grammar is None:
            raise ApiError(
                400,
                "strict=true is not held where this model decides to call: set tool_choice to 'required' or "
                "to a function, or leave strict out",
                param="tools",
            )
        return StructuredOutputsParams(grammar=grammar)

    def _forced_schema(self) -> Mapping[str, Any]:
        body, functions = self._body, self._body.callable_functions
        if body.way == "named":
            return functions[0].schema_of_arguments
        return calls_schema(functions, is_one=not body.parallel_tool_calls)

    def form_after(self, prompt: str) -> StructuredOutputsParams | None:
        """The form of an answer to this prompt, which says whether reasoning comes first; None: no other."""
        reasoning = self._reasoning_after(prompt) if self._is_forced else None
        return None if reasoning is None else forced_form(self._forced_schema(), reasoning)


def call_of(call: Call) -> dict[str, Any]:
    """A call as OpenAI's API writes it."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def call_delta(call: Call) -> dict[str, Any]:
    """What a call has grown by, as a stream writes it."""
    if call.id is not None:
        return {"index": call.index, **call_of(call)}
    return {"index": call.index, "function": {"arguments": call.arguments}}
