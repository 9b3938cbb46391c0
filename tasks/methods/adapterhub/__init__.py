"""Bottleneck adapters from and to AdapterHub's format, that of the package `adapters` 1.3.0.

    python -m tasks.methods.adapterhub --from DIR OUT                      theirs to ours
    python -m tasks.methods.adapterhub --to DIR OUT --model-type bert      ours to theirs

The same weights under other names, and a configuration in other words:

    double_seq_bn                          placement double_sequential
    seq_bn                                 placement sequential_normed, in post-norm blocks alone
    seq_bn with original_ln_before=False   placement sequential
    par_bn                                 placement parallel, in post-norm blocks alone
    classification head, static            modules_to_save

What would compute something else is refused by the name of its field. What acts in training alone
(dropout, stochastic_depth, init_weights) is not carried over. tests/reference/adapterhub.py holds
both directions to the package's own outputs.
"""
