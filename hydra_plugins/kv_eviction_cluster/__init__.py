"""The launchers of conf/cluster/: Hydra's own for Slurm and Ray, except that no job's end hides the others'."""
