"""The parsers of tool calls, by the names of vLLM's option `--tool-call-parser`."""

from collections.abc import Mapping

from pjengine.serving.hermes import HermesParser
from pjengine.serving.llama3_json import Llama3JsonParser
from pjengine.serving.mistral import MistralParser
from pjengine.serving.qwen3 import Qwen3Parser
from pjengine.serving.tool_parser import ToolParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "qwen3": Qwen3Parser,
    "qwen3_coder": Qwen3Parser,
    "qwen3_xml": Qwen3Parser,
}
