"""What works with another library, which bigload does not require: it is imported when it is first needed."""
