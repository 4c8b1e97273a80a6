"""Measuring this machine: its engine, its links, its running cluster; and a plan against what was measured."""
