"""数据文件 → 样本 → 一步步的 micro batch。"""
