def play_mdps(*a): return {}
