"""Prometheus and Grafana for runs: dashboards from the metric table, rules, and the targets of all runs in one file."""
