"""The gallery in memory: FAISS recall and exact modulated distances. No SQL."""
