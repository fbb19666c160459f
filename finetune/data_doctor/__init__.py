"""数据体检：python data_set.py check。"""
