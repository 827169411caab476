"""Facts of trading that several plugins need: symbols, money, market sessions, proportions, calibration.

A library, not a plugin: it registers no hook, keeps no state and emits nothing. The core never imports it.
"""
