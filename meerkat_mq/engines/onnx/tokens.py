"""The tokenizer of a bundle: `tokenizers` alone, called as transformers' are."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from meerkat_mq.engines.onnx.layout import AGAIN
from meerkat_mq.engines.torch.tokenizer_trial import PROBES, fingerprint_of, try_tokenizer
from meerkat_mq.errors import ModelError, reason


class BundleTokenizer:
    """What `prompts.Reader` needs of a tokenizer.

    Raises:
        ModelError: the file cannot be read, or not within bounds of time and memory.
    """

    def __init__(self, file: Path, pad: int) -> None:
        try_tokenizer(file)
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise ModelError(str(file), f"the tokenizer cannot be loaded ({reason(error)})", AGAIN) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_token_id = pad

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
    ) -> dict[str, list[list[int]] | list[int]]:
        """{"input_ids": ids of each text, or of the one}."""
        if truncation:
            self._tokenizer.enable_truncation(max_length)
        try:
            texts = [text] if isinstance(text, str) else list(text)
            found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        finally:
            self._tokenizer.no_truncation()
        ids: list[list[int]] = [encoding.ids for encoding in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def fingerprint(self) -> bytes:
        """As in masks."""
        return fingerprint_of([encoding.ids for encoding in self._tokenizer.encode_batch(list(PROBES))])
