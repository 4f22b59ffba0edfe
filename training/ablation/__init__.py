"""The paper's ablation (§4.4, §4.5) as commands: Table 3, the sweeps of Figure 3, Figure 4."""
