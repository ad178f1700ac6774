"""What every worker is, whatever its role: an engine on its thread, served to the cluster."""
