"""Names of the tasks that lmms-eval finds, and their YAML."""
