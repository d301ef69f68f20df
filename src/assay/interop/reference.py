"""Logits by a format's own implementation: `transformers`, of a folder or of a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from assay.errors import AssayError
from assay.interop.huggingface import layout


def missing(source: str, to: str) -> str | None:
    """Why a conversion cannot be verified here, or None."""
    if source in ("run", "assay") and to == "assay":
        return None
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} must be installed to compare with"
    return None


def logits(path: Path, kind: str, tokens: np.ndarray, dtype: str | None) -> np.ndarray:
    """float32 [batch, tokens, vocabulary] of a Hugging Face folder or a GGUF file, on the CPU.

    With `dtype`, the weights are rounded to it first, as those of a cast conversion are.

    Raises:
        AssayError: if `transformers` finds a key missing or unexpected, or cannot read it.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is enough
    try:
        model = _from_gguf(path) if kind == "gguf" else _from_folder(path)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise AssayError(f"{path}: transformers cannot load it ({error}).") from None
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters() if dtype is not None else ():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        # Of an encoder and a decoder, both read the text.
        both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **both).logits.numpy()


def _from_folder(path: Path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    form = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = form.from_pretrained(
        path, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    _all_found(path, info)
    return model


UNREAD = ("mixtral", "olmoe")
"""Families whose GGUF files `transformers` does not read, though it has their models. Nor does it
read a model in several files."""


def _from_gguf(path: Path):
    """As `from_pretrained(gguf_file=...)` does, which asks for one package more (accelerate).

    It takes every T5 to be gated by ReLU, which none is; of T5 the config is that of `gguf.py`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.initialization import no_init_weights

    from assay.interop.gguf import GgufFile

    if (file := GgufFile(path)).family in UNREAD or file.in_parts:
        return _of_tensors(file)
    from transformers import modeling_gguf_pytorch_utils as reading

    reading.tqdm = lambda tensors, **options: tensors  # its bar is not the logging's
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if config.model_type == "t5":
        config = AutoConfig.for_model(**file.config())
    with no_init_weights():
        form = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = form.from_config(config)
    state = reading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(state, strict=False, assign=True)
    missing = set(found.missing_keys)
    model.tie_weights(missing_keys=missing)  # takes those out that it ties
    if missing or found.unexpected_keys:
        raise AssayError(f"{path}: transformers finds {found}.")
    return model


def _of_tensors(file):
    """`transformers`' model of a GGUF file's tensors, of which our own reading has no part.

    Names are by the `gguf` package's table, and the order of rows by `transformers`' own of a
    Llama; the config is that of `gguf.py`.
    """
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
    )
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    config = AutoConfig.for_model(**file.config())
    architecture = file.metadata["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
    state = {}
    for name, (theirs, expert) in _names_by_gguf(file, architecture).items():
        array = processor.process(file.as_it_lies(theirs, expert), theirs).weights
        state[name] = torch.from_numpy(np.array(array, np.float32))
    forms = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        forms = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    model, info = forms[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=state,
        output_loading_info=True,
        dtype=torch.float32,
    )
    _all_found(file.path, info)
    return model


def _names_by_gguf(file, architecture: str) -> dict[str, tuple[str, int | None]]:
    """`transformers`' names of tensors -> the file's, and which expert of it, where it has several.

    The table knows stacked experts only; files before April 2024 have a tensor for each.
    """
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, file.spec.decoder.num_layers)
    names = {}
    for tensor in layout(file.spec, file.family):
        module, _, part = tensor.name.rpartition(".")
        stacked = module.replace(f".experts.{tensor.expert}.", ".experts.")
        name = f"{table.get_name(stacked)}.{part}"
        if tensor.expert is None or file.has(name):
            names[tensor.name] = (name, tensor.expert)
        else:
            names[tensor.name] = (name.replace("_exps.", f".{tensor.expert}."), None)
    return names


def _all_found(path: Path, info: dict) -> None:
    for problem, names in info.items():
        if names:
            raise AssayError(f"{path}: transformers finds {problem}: {names}.")
