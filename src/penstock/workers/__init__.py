"""Workers: functions that are resident, run again whenever they end, on one process of the cluster or on each."""
