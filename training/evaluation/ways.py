"""The ways of ranking that an evaluation compares, and their names in files and in tables."""

# In the order of tables. Keys are names in JSON.
NAMES = {
    "modulated": "modulated",
    "unmodulated": "unmodulated",
    "as_trained": "as trained, s = 1",
    "mean_modulation": "mean γ, β",
    "without_mirror": "without mirror",
    "with_mirror": "with mirror",
    "raw": "raw F",
    "score": "score",
    "unmodulated_score": "unmodulated score",
    "reranked_as_served": "re-ranked, served",
    "reranked": "re-ranked, k1 = 20",
}
# What explains a ranking and is none to use: left out where ours stand beside published rows.
DIAGNOSES = ("mean_modulation", "raw")
