"""Jobs that listen to direct messages in Slack."""
