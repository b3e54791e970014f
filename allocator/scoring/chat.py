"""Chats as a model reads them: messages through the checkpoint's own chat template.

In: messages, and the tokenizer whose template applies. Out: text with special tokens in it.
Invariant: the same messages give the same text on any day; the template runs in transformers'
sandbox.
"""

from collections.abc import Mapping
from typing import Any

from allocator.checkpoint.tokenizer import Tokenizer
from allocator.errors import CalibrationError, first_line

_DATES = {"%d %b %Y": "26 Jul 2024", "%d %B %Y": "26 July 2024", "%B %d, %Y": "July 26, 2024"}
_FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ " + repr(_DATES) + ".get(format, '2024-07-26') }}"
    "{%- endmacro -%}"
)
"""Replaces today's date, which some templates put before a chat."""


class ChatTemplate:
    """The chat template of a checkpoint.

    Args:
        tokenizer: whose template named `default`, else whose first one, is used.

    Raises:
        CalibrationError: if the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            templates = tokenizer.chat_templates
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{tokenizer.path}: the chat template cannot be read ({first_line(error)}); fetch "
                "its files again, or give records with text"
            ) from None
        if not templates:
            raise CalibrationError(
                f"{tokenizer.path}: the tokenizer has no chat template, which messages need; put "
                "its chat_template.jinja there, or give records with text"
            )
        template = next(iter(templates.values()))
        self._template = _FIXED_DAY + template if "strftime_now" in template else template
        self._special = {
            f"{role}_token": tokenizer.texts[number]
            for role, number in tokenizer.special_ids.items()
            if number in tokenizer.texts
        }

    def render(self, record: Mapping[str, Any], where: str) -> str:
        """Returns the text of a record's `messages`, and of its `tools` if there are any.

        Raises:
            CalibrationError: if the messages are not such, or the template refuses them.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = record["messages"]
        if not (isinstance(messages, list) and messages) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        ):
            raise CalibrationError(
                f"{where}: needed messages, a list of objects with role and content"
            )
        # columns of a table hold None where a message has no such key; templates ask for the key
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            rendered, _ = render_jinja_template(
                [messages],
                tools=record.get("tools") or None,
                chat_template=self._template,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise CalibrationError(
                f"{where}: the chat template refuses these messages ({first_line(error)})"
            ) from None
        return str(rendered[0])
