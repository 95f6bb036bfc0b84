"""Tasks: functions that are called through queues, and the schedules that call them."""
