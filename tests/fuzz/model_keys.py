"""Keys that libraries know in the files of a model folder, each with values that they would believe."""

from typing import Any

from tests.fuzz.mutate_json import ELSEWHERE, NONSENSE, Keys

SIZES = (0, 1, 3, 6, 10**4, 10**6, 2**24, 2**31, 2**40, -1, 1.5, "8", None, True)
TOKENS = ("<s>", "<unseen>", "", "\ud83d", "x" * 4000, {"content": "<new>"}, {"__type": "AddedToken"}, 7, None, ["<s>"])
ROPES: tuple[Any, ...] = (
    *({"rope_type": kind, "factor": 4.0} for kind in ("linear", "dynamic", "yarn", "longrope", "llama3", "x")),
    *({"type": "dynamic", "factor": factor} for factor in (0, -1, 1e308, float("nan"), "2", None)),
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": "x"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    *({"rope_theta": value, "rope_type": "default"} for value in (0, -1, float("inf"), None, "x")),
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 2**62},
    {"full_attention": {"rope_type": "default"}},
)
TYPES = (
    *("bert", "llama", "gpt2", "t5", "whisper", "clip", "mamba", "mixtral", "xlnet", "roberta", "rwkv", "llava", "x"),
    *("encoder-decoder", "timm_wrapper", "gemma3", "qwen2", "distilbert", "auto", "", "AutoModel", "PreTrainedConfig"),
)
CLASSES = (
    *("LlamaTokenizer", "BertTokenizer", "GPT2Tokenizer", "T5Tokenizer", "XLNetTokenizer", "CanineTokenizer"),
    *("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "ByT5Tokenizer", "PreTrainedTokenizer"),
    *("Wav2Vec2CTCTokenizer", "BertJapaneseTokenizer", "TapexTokenizer", "MistralCommonBackend", "AutoTokenizer", "X"),
    *("RagTokenizer", "os.system", "SentencePieceBackend", "PythonBackend"),
)
REGEXES = ("(a+)+$", "(x+x+)+y", "(", "(?=a)*", "\\", "[", "(.*)*" * 30, "(?:(?:(?:a?){99}){99}){99}", "a{1,999999999}")

CONFIG: Keys = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"), SIZES),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), SIZES),
    **dict.fromkeys(("type_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "num_labels"), SIZES),
    **dict.fromkeys(("chunk_size_feed_forward", "sliding_window", "pretraining_tp", "max_length"), SIZES),
    **dict.fromkeys(("dtype", "torch_dtype"), ("float8_e4m3fn", "torch.float16", "bool", "int8", "x", 16, {"a": "b"})),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ROPES),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta"), NONSENSE[:15]),
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob"), (2, -1, "x", None, float("nan"))),
    "model_type": TYPES,
    "architectures": (["BertForMaskedLM"], ["LlamaForCausalLM"], ["X"], [None], "LlamaForCausalLM", [], ["os"], {}),
    "hidden_act": ("x", "", None, 7, "gelu", "silu", ["gelu"], "quick_gelu", "__init__", "relu2"),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flex_attention", "x", "hub/kernel", 3, {"": "x"}),
    "_attn_implementation": ("paged|sdpa", "hub/kernel:main", "x", None),
    "experts_implementation": ("hub/kernel", "x"),
    "position_embedding_type": ("relative_key", "x"),
    "auto_map": ({"AutoConfig": "code.Config"}, "x", [], None, {}, {"AutoModel": ELSEWHERE}),
    "quantization_config": ({"quant_method": "gptq"}, {}, "x", [], {"load_in_8bit": True}, None),
    "text_config": ({}, {"quantization_config": {"bits": 4}}, {"hidden_size": 2**40}, "x", None, [1]),
    "vision_config": ({}, {"hidden_size": -1}, "x"),
    "sub_configs": ({}, "x"),
    "id2label": ({"0": "a"}, {"x": "a"}, ["a"], 7, {"0": None}),
    "label2id": ({"a": 0}, {"a": "x"}, 7),
    "layer_types": (["full_attention"], ["x"], "x", [], ["sliding_attention"] * 9, [None]),
    "tie_word_embeddings": (True, False, None, "x"),
    "is_decoder": (True, "x", None),
    "is_encoder_decoder": (True, "x"),
    "output_attentions": (True, "x"),
    "return_dict": (False, None),
    "use_return_dict": (False, "x"),
    "use_cache": (True, "x"),
    "name_or_path": (ELSEWHERE, "hub/name", 7),
    "_name_or_path": (ELSEWHERE, "/etc", 7),
    "transformers_version": ("0.0", 7, None, "x", "999.0"),
    "transformers_weights": (ELSEWHERE, "x.safetensors"),
    "pruned_heads": ({"0": [0]}, {"x": 1}, {"9": [9]}, [1]),
    "task_specific_params": ({}, "x"),
    "problem_type": ("x", "regression"),
    "base_model_tp_plan": ({"layers.*": "colwise"}, "x"),
    "generation_config": ({}, "x"),
    "distributed_config": ({}, "x"),
}
TOKENIZER_CONFIG: Keys = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token"), TOKENS),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "use_fast"), (True, False, "x",
    7)),
    **dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "name_or_path"), (ELSEWHERE, "x", 7, None, "..")),
    "tokenizer_class": (*CLASSES, None, 7, ""),
    "backend": ("tokenizers", "sentencepiece", "mistral-common", "x", 7, None),
    "model_max_length": (*SIZES, 1e30, float("nan"), float("inf"), "x", 7.9, 8),
    "auto_map": ({"AutoTokenizer": ["code.T", None]}, "x", {"AutoTokenizer": None}),
    "added_tokens_decoder": (
        {"0": {"content": "<s>", "special": True}}, {"999": {"content": "<far>"}}, {"x": {"content": "<a>"}},
        {"-1": {"content": "<a>"}}, {"3": "x"}, {"3": {"content": 7}}, {"3": {}},
        {str(2**40): {"content": "<far>"}},
        {"4": {"content": "<s>", "lstrip": "x"}}, {"321": {"content": ""}}, {},
    ),
    "additional_special_tokens": (["<a>"], ["<a>", "<a>"], "x", [7], [{"content": "<b>"}], [None], {}),
    "extra_special_tokens": ({"image": "<i>"}, ["<i>"], {"image": 7}, "x", {"pad_token": "<pad>"}),
    "chat_template": ("{{ x", "{% for i in range(10**9) %}{% endfor %}", 7, [{"name": "a"}], {"a": 1}, ELSEWHERE),
    "padding_side": ("left", "x", 7),
    "truncation_side": ("left", "x", 7),
    "model_input_names": (["input_ids"], [], "x", [7], ["x"], None),
    "clean_up_tokenization_spaces": (True, "x"),
    "processor_class": ("LlavaProcessor", "x", 7),
    "sp_model_kwargs": ({"x": 1}, "x"),
    "max_length": (3, -1, "x"),
    "padding": (True, "max_length", "x"),
    "truncation": (True, "x"),
    "special_tokens_map_file": (ELSEWHERE, 7),
    "split_special_tokens": (True, "x"),
    "local_files_only": (False,),
    "trust_remote_code": (True,),
    "from_slow": (True,),
    "init_inputs": ([], [ELSEWHERE], "x"),
    "transformers_version": ("4.0", "x", 7),
    "fix_mistral_regex": (True, "x"),
    "model_specific_special_tokens": ({"a": "<a>"}, "x"),
    "tokenizer_object": ("x", {}),
}  # fmt: skip
TOKENIZER: Keys = {
    "version": ("2.0", 1, None),
    "truncation": ({"max_length": 0, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}, "x"),
    "padding": (
        {"strategy": {"Fixed": 10**12}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 2, "pad_type_id": 0,
         "pad_token": "<pad>"},
        {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": 10**12, "pad_id": 999, "pad_type_id": 0,
         "pad_token": "<far>"},
        {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
         "pad_token": ""},
    ),
    "added_tokens": tuple(
        [{"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": normal, "special": special}]
        for number, content, normal, special in (
            (-1, "<a>", False, True), (2**32 - 1, "<a>", False, True), (2**40, "<a>", False, True), (0, "", True,
            False),
            (5, " the", True, False), (0, "<other>", False, True), (1.5, "<a>", False, True), (320, "e", False, False),
        )
    ),
    "normalizer": (
        *({"type": "Replace", "pattern": {"Regex": regex}, "content": "x"} for regex in REGEXES),
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000}, {"type": "Lowercase"}, {"type": "X"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xy"}, {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "ab"}] * 40}, {"type": "Precompiled",
         "precompiled_charsmap": "AAAA"}, {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}, {"type": "Strip", "strip_left": True},
    ),
    "pre_tokenizer": (
        *({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": True} for regex in REGEXES),
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}, {"type": "Digits"},
        {"type": "Metaspace", "replacement": "xx"}, {"type": "Metaspace", "replacement": "\u2581",
        "prepend_scheme": "x"},
        {"type": "ByteLevel"}, {"type": "Sequence", "pretokenizers": []}, {"type": "FixedLength", "length": 0},
        {"type": "CharDelimiterSplit", "delimiter": ""}, {"type": "Whitespace"}, {"type": "UnicodeScripts"},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}, {"type": "ByteLevel"},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<far>", "type_id": 0}}], "pair": [],
         "special_tokens": {"<far>": {"id": "<far>", "ids": [2**32 - 1] * 9, "tokens": ["<far>"]}}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 2**32}}] * 3, "pair": [],
         "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [],
         "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<far>", 999]}, {"type": "Sequence", "processors": []},
        {"type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 10**9], "trim_offsets": True},
    ),
    "decoder": ({"type": "X"}, {"type": "WordPiece", "prefix": 7}, None, {"type": "CTC"}),
    "model": (
        {"type": "BPE", "vocab": {}, "merges": []}, {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, {"type": "BPE", "vocab": {"a": 0},
        "merges": ["a"]},
        {"type": "BPE", "vocab": {"a": 0, "b": 0, "c": 0}, "merges": [], "dropout": 7.0, "unk_token": "none"},
        {"type": "WordLevel", "vocab": {}, "unk_token": "x"}, {"type": "WordPiece", "vocab": {"x": 0},
         "unk_token": "none", "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**12},
        {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "",
         "max_input_chars_per_word": 0},
        {"type": "Unigram", "vocab": [], "unk_id": 0}, {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}, {"type": "X"}, {"vocab": {"a": 1}}, None,
        {"type": "Unigram", "vocab": [["", 1e308]] * 3, "unk_id": 0, "byte_fallback": True},
    ),
}  # fmt: skip
INDEX: Keys = {
    "metadata": ({"total_size": -1}, {"total_size": 2**70}, "x", [], None),
    "weight_map": (
        {"lm_head.weight": ELSEWHERE}, {"lm_head.weight": "/dev/zero"}, {"x": "model.safetensors"}, {}, [], "x", None,
        {"x": ".hidden.safetensors"}, {"x": "config.json"}, {"x": "\0.safetensors"}, {"x": "y" * 300 + ".safetensors"},
        {"": "absent.safetensors"}, {"x": "model-00001-of-00002.safetensors"}, {"x": ["model.safetensors"]},
    ),
    "weights": ({}, 7),
}  # fmt: skip
HEADER: Keys = {
    "__metadata__": ({}, {"format": "tf"}, {"format": "x"}, {"format": 7}, "x", None, [], {"x": {"y": 1}}),
    "lm_head.weight": (
        *({"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for shape in ([2**31, 2**31], [2**62, 0])),
        *({"dtype": kind, "shape": [4], "data_offsets": [0, 4]} for kind in ("X", "F4", "F8_E4M3")),
        {"dtype": "F32", "shape": [320, 8], "data_offsets": [0, 10240]},
    ),
    "model.layers.7.self_attn.q_proj.weight": ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},),
    "x" * 4000: ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},),
    "\x1b[2J": ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, {}),
}  # fmt: skip
