"""Chat messages as the text of a prompt.

A run does not record how the dialogs in its data were written, so a conversation becomes text by a template that
whoever starts the server gives. Without one, a single message of a user is the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reformer_dist.errors import ConfigError

ROLE, CONTENT = "{role}", "{content}"


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a message, in which {role} and {content} are replaced."""

    text: str

    def __post_init__(self) -> None:
        """Raises ConfigError, which names the option."""
        if self.text.count(CONTENT) != 1 or self.text.count(ROLE) > 1:
            requirement = "must hold {content} once, and {role} at most once, such as '{role}: {content}\\n'"
            raise ConfigError(f"--chat-template {self.text!r}: {requirement}")

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """All messages (role, content), and the beginning of one of the assistant."""
        # before and after the content separately: a content may hold "{role}"
        before, _, after = self.text.partition(CONTENT)
        texts = [before.replace(ROLE, role) + content + after.replace(ROLE, role) for role, content in messages]
        return "".join(texts) + before.replace(ROLE, "assistant")


def prompt_of_chat(messages: Sequence[tuple[str, str]], template: ChatTemplate | None) -> str:
    """The prompt of messages (role, content). Raises ConfigError if it would need a template."""
    if template is not None:
        return template.prompt(messages)
    roles = [role for role, _ in messages]
    if roles == ["user"]:
        return messages[0][1]
    fix = "give one message of the user, or start the server with --chat-template"
    raise ConfigError(f"messages: of {', '.join(roles)}, and no template says how they become text; {fix}")
