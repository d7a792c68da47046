"""The names that lmms-eval finds, and the YAML behind them."""
