"""The tokenizer of a bundle: `tokenizers` alone, called as transformers' are.

Its chat template is a program, and stays where the bundle was made. The bundle has what came of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from meerkat_mq.engines.continuations import SYSTEM
from meerkat_mq.engines.onnx.layout import AGAIN
from meerkat_mq.engines.torch.tokenizer_trial import PROBES, fingerprint_of, try_tokenizer
from meerkat_mq.errors import ModelError, reason

Chat = tuple[str, str]  # up to where the assistant is to answer, and with the answer


class BundleTokenizer:
    """What `prompts.Reader` needs of a tokenizer.

    Args:
        pad, end: ids.
        chats: a chat without a system message, and one with `SYSTEM`, as the template rendered them; or None.

    Raises:
        ModelError: the file cannot be read, or not within bounds of time and memory.
    """

    is_fast = True

    def __init__(self, file: Path, pad: int, end: int | None, chats: tuple[Chat | None, Chat | None]) -> None:
        try_tokenizer(file)
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise ModelError(str(file), f"the tokenizer cannot be loaded ({reason(error)})", AGAIN) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_token_id, self.eos_token_id = pad, end
        self._chats = chats
        self.chat_template = any(chats)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
        return_offsets_mapping: bool = False,
    ) -> dict[str, list[Any]]:
        """{"input_ids": ids of each text, or of the one}; "offset_mapping": where the tokens stand in it."""
        if truncation:
            self._tokenizer.enable_truncation(max_length)
        try:
            texts = [text] if isinstance(text, str) else list(text)
            found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        finally:
            self._tokenizer.no_truncation()
        answer: dict[str, list[Any]] = {"input_ids": [encoding.ids for encoding in found]}
        if return_offsets_mapping:
            answer["offset_mapping"] = [encoding.offsets for encoding in found]
        return {key: values[0] if isinstance(text, str) else values for key, values in answer.items()}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, **_: object
    ) -> str:
        """The chat that was rendered where the bundle was made, with the system message of these.

        Raises:
            ValueError: none was rendered, or the template may change the message.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        chat = self._chats[bool(system)]
        if chat is None:
            raise ValueError(f"it takes no chat {'with' if system else 'without'} a system message")
        if system != system.strip():
            raise ValueError("in a bundle, no white space may stand around the system message")
        return chat[not add_generation_prompt].replace(SYSTEM, system)

    def fingerprint(self) -> bytes:
        """As in masks."""
        return fingerprint_of([encoding.ids for encoding in self._tokenizer.encode_batch(list(PROBES))])
