"""What can tell the share of a rare class: divergences of reference models, conditional branches, or the model's own samples.

For a class restriction KL(q^i||p) is -log share_i plus the misfit inside the class (methods.md H1), so every estimate of
that divergence, in nats, is one of -log share_i. One model p is trained on the data with the rare classes raised to a
known proportion, its own condition 0; the branches of the same network (condition i) learn the rare sets. Then, for each
rare class, five kinds of estimate against the share found in many samples of p, judged by the exact posterior (mixture) or
by a classifier that saw none of the training (digits):

    reference       a model of its own, trained on the set; point KL on the set's own samples, then on fresh ones
    branch          the conditional branch of p's network; likewise
    held-out split  a model trained on one half of the set; point KL on the other half
    on-policy       samples of p, judged by the training labeller, as the training loop measures
    corrected       the same samples, judged by a single classifier without the shifted copies (digits: what is gained)

`bias` is the mean over classes of estimate minus truth in nats, `worst` the largest one in size; `s.e.` that of one
estimate, as it reports itself. `s` is the time of one estimate, `once` that of training what it needs; `s.e. sqrt(s)` is
the standard error at one second an estimate.

    python benchmarks/share_estimators.py [--seed 0] [--only mixture,digits] [--quick]
"""
