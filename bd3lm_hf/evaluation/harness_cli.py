"""`bd3lm harness`: the command `lm_eval` with the models of this package. Imports nothing slow.

usage: bd3lm harness --model_args pretrained=DIR[,FIELD=VALUE ...] --tasks TASK,... [flags of lm_eval run]

`--model bd3lm` is added if no model is named. Fields of --model_args are the arguments of BD3LMHarness: pretrained,
tokenizer, estimator, num_samples, seed, batch_size, max_length, max_gen_toks, add_bos_token, check_greedy, device,
dtype, trust_remote_code. All other flags are those of `lm_eval run`, see `lm_eval run --help`; dashes and underscores
are both accepted. `bd3lm harness ls` and `bd3lm harness validate` are those of `lm_eval`.
"""

import sys
from collections.abc import Sequence

from bd3lm_hf.argument_parser import with_underscores


# Verbs of `lm_eval` that take no model.
_VERBS_WITHOUT_MODEL = {"ls", "validate"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `lm_eval` with these arguments, and `--model bd3lm` if they name no model.

    Raises:
        ValueError: if the harness is not installed, or the input is wrong; the harness reports its own errors.
    """
    words = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").partition("\n\n")[2].rstrip())
        return
    # Registers the model, and refuses an environment without the harness.
    import bd3lm_hf.evaluation.harness  # noqa: F401

    from lm_eval.__main__ import cli_evaluate  # isort: skip

    names_model = any(word.split("=")[0] in ("--model", "-M", "--config", "-C", "-h", "--help") for word in words)
    if words[0] not in _VERBS_WITHOUT_MODEL and not names_model:
        words = [*words, "--model", "bd3lm"]
    before = sys.argv
    sys.argv = ["lm_eval", *words]  # the harness reads its arguments from there
    try:
        cli_evaluate()
    finally:
        sys.argv = before
