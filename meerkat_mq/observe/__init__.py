"""What people see: logs, progress, reports, and the frame around a service process."""
